"""Search the settings of a recipe that keep a budget, by measured error and measured time."""
