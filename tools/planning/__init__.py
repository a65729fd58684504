"""What ``plan.py`` knows of settings, work, memory and time."""
