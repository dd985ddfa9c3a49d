"""Published and small recipes, as YAML: `vrpo presets` lists them."""
