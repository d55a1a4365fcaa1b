"""Charts that answer the pointer, in a page that needs no network."""
