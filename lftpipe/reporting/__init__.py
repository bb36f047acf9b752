"""Tables, pictures and pages: JSON in, files out. No torch."""
