"""Methods as pure functions of arrays: no framework, no I/O, no mesh; keys are arguments.

Shape letters, project-wide: b batch, t query length, s key length, d model width, h heads,
k head dim, c chunk, v vocabulary, n samples, g group. Where a specification writes upper-case
letters (S, D, H, V), a docstring that quotes it does so too.
"""
