"""Int8 drafters: SmoothQuant and W8A8."""
