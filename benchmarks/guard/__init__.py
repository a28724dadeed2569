"""Short trainings, healthy and with a fault, for the guard."""
