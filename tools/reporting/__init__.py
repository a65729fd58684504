"""The parts of ``report.py``: what is read, how it is drawn, and the page."""
