"""Public reports on batch norm, rebuilt small: what the doctor and the guard say of other people's faults."""
