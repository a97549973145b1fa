"""Hidden states along depth and time: recording and, later, measuring them."""
