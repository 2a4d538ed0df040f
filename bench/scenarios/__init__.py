"""One file per scenario; see bench/scenario.py for what it has to hold."""
