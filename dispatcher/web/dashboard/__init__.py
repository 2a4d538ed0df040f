"""The dashboard: pages for the people behind the API, rendered here and live in the browser.

Every page and every form works without JavaScript; the modules in `static/dashboard` add what moves. Pages show what
the API shows, by the same code, and nothing of another account.
"""
