"""Memory of whole models while they train, by method: an analytical model, and measurements.

:mod:`tape` is autograd over sizes; :mod:`linears`, :mod:`modules`, :mod:`llama` and :mod:`encoder`
define what each op allocates and saves; :mod:`predict` runs a step of these, :mod:`measure` one of
the real model. :mod:`plan` lists the cases, and :mod:`command` is ``neuroada bench memory``.
"""
