"""The transformer: its layers, attention, loss and parameter trees."""
