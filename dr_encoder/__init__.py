"""The codec: a client update in R^n to and from a code in R^k. Knows nothing of clients, servers or epsilon."""
