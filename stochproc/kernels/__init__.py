"""Part under construction."""
