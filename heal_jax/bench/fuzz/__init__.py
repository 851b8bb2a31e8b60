"""`heal bench fuzz`: broken and hostile input of every kind, drawn by hypothesis."""
