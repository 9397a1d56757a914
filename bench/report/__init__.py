"""What is derived from records: terminal table, Markdown, one self-contained HTML page."""
