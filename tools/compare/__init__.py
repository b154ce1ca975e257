"""`v4 compare`: at which token another deployment's log-probabilities depart from ours.

cli -> run (the verb) -> prompts (what is scored), ways (how an endpoint is asked) over client (HTTP), answers (formats) and names
(of tokens), scoring (our side), measure (differences), report (table, JSON, file).
"""
