"""``neuroada bench quality``: what methods of fine-tuning reach at equal trainable budgets.

:mod:`settings` and :mod:`variants` say what is run, :mod:`tasks` on what, :mod:`methods` how a
model is adapted, :mod:`suite` in which order; :mod:`summary` has the statistics, which
:mod:`neuroada_kernels.benchmarks.html.quality` shows.
"""
