"""Images and labels as checked uint8 arrays, from wherever they come."""
