"""How fast and how small the exporter's files are, beside what the converters' own quantizers make.

``python -m benchmarks exporters`` makes the files, measures them, stores ``results/exporters.json`` and draws it.
``--make DIR`` makes the files only; ``--measure DIR`` measures those.
"""
