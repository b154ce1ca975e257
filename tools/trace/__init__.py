"""`v4 trace`: record a run op by op, judge and repeat recorded calls on any machine, find the first wrong one."""
