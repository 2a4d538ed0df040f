"""The dashboard: pages for the people behind an account, and for the operator."""
