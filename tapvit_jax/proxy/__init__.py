"""The device's summary of its data, and the metric dataset chosen from it."""
