"""``neuroada bench quality``: what methods of fine-tuning reach at equal trainable budgets.

:mod:`settings` and :mod:`variants` define the runs, :mod:`tasks` their data, :mod:`methods` how a
model is adapted, :mod:`suite` the order; :mod:`summary` computes the statistics that
:mod:`neuroada_kernels.benchmarks.html.quality` shows.
"""
