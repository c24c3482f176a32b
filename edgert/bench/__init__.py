"""Speed and memory of a bundle, measured on the path that users run, and only if it answered right.

plan     what is asked: the same prompt every time
measure  the timed requests
verify   whether what was timed is what the model says
cold     a fresh process, from its start to the first token
power    rails and modes of a Jetson, where there are any
facts    what else decides a figure: processor, clocks, memory
result   all of it as one JSON object, written and read back
card, page, compare    that object for people
"""
