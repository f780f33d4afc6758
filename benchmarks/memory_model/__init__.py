"""Memory of whole models while they train, by method: a stated model, and measurements of it.

:mod:`tape` is autograd over sizes; :mod:`linears`, :mod:`modules`, :mod:`llama` and :mod:`encoder`
state what each op allocates and saves; :mod:`predict` runs a step of that, :mod:`measure` one of
the real model. :mod:`plan` says of what, and :mod:`command` is ``neuroada bench memory``.
"""
