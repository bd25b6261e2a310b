"""Evaluations of the Code Llama paper (arXiv:2308.12950).

HumanEval, MBPP, infilling, perplexity and needle. Each takes an LLM and returns a dictionary that
JSON can represent: `task`, `settings`, `scores`, and the samples. Two runs with the same settings
give the same samples, bit for bit.
"""
