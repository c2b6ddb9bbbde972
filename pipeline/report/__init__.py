"""The HTML report: what it shows, the pictures, the page."""
