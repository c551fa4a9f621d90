"""The studio: a page in the browser to draw, see and train in."""
