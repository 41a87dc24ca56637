"""Does a language model of text have a unit for sentiment? The linear probe of Radford, Jozefowicz & Sutskever 2017."""
