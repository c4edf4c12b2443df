"""The script that trained the embedded model, and the one that measures it; not in the wheel."""
