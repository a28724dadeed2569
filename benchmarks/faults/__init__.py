"""Fault injection: each fault the doctor knows put into healthy models, and how many of them it finds.

``subjects`` trains healthy models, ``injections`` puts one fault into a copy (``layers`` are layers that are
wrong by construction, ``ranks`` the faults that need several processes), ``bench`` counts what the doctor
finds: ``python -m benchmarks.faults.bench``.
"""
