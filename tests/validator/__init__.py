"""The same requests through tdcache, hooks written by hand and other libraries; ``python -m validator`` compares them.

subjects, subject_list, own_models   models, their inputs, and the places of each that are asked about
by_*                                 one library each: six functions, one a request
answers, compare                     what a library answered, kept in files; what differs from the hooks by hand
known_faults                         faults of other libraries that are known, tried again
page, __main__                       the page docs/validator.md, and the command
"""
