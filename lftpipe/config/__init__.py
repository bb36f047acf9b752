"""Settings, recipes and the small languages of options. No torch, no numpy."""
