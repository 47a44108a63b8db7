"""Keys and values of one member's sequences: in rows, or in pages."""
