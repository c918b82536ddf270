"""Privacy: what was released (events, ledger), what it costs (accountants, adversaries) and the noise itself."""
