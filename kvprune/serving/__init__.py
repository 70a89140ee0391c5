"""A server that speaks the API of OpenAI, over compressed caches: `kvprune serve`.

command    the command line
app        the application: what is answered to which address
requests   what a body may say, and what is answered to one that says something else
prompts    messages and texts as tokens, in two parts: a prefix that is compressed by itself, and the rest
jobs       one request on its way: what it asks, and where its answer goes
engine     requests wait, run, and can be called off; the answer comes in pieces
batch      requests of one policy are answered together
writing    one answer as it is written: text of tokens, strings that end it, sampling
prefixes   compressed prefixes, found by their tokens, in memory and in files
metrics    what is counted, as Prometheus reads it

Only `command` can be imported without the extra `serve`.
"""
