"""From crawled text to a corpus: a list of steps that keep, change or drop documents, on any number of workers.

A step is a function of one document (documents.py), or an object that first learns from files (`prepare`), or one that
must see the whole corpus before it decides (`sketch` each shard, `decide`): engine.py has the three forms.

What is written depends on the input, the config and the steps alone: never on how many workers there were, nor on how
often they were killed.
"""
