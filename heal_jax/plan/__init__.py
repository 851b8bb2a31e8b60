"""`heal plan`: whether a run fits on a slice of TPUs, and what it costs, before renting one."""
