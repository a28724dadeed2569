"""Models of other libraries, and what surgery makes of them."""
