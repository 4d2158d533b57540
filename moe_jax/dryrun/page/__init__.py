"""What a dry run prints and writes: text, bars, an HTML page."""
