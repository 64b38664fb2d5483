"""Stage `sweep`: many students of the same clips, compared by their means over seeds. See `stage`."""
