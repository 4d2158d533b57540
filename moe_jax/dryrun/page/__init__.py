"""Presents the report of a dry run as text, as bar charts and as an HTML page."""
