def page(record, samplers): return ""
def plot(record, file): pass
