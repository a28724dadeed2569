"""The lab: a page on this machine where one sees batch normalization work, and breaks it.

``benches`` computes, with this package's layers and no web code; the files beside it carry the answers to the
page. Needs the extra ``lab``; nothing outside the command line imports it.
"""
