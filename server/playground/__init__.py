"""The playground: a page that shows how models write one text, and stored answers to show it without models."""
