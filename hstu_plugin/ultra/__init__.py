"""What ULTRA-HSTU (arXiv 2602.16986) adds around the transducer."""
