# awk -v expected="Avx2Micro 2 6 Avx512Micro 4 6" -v single=160 -f machine_code.awk: reads what `objdump -d -C
# --no-show-raw-insn` prints of the kernels.
#
# Checks the innermost loops of the micro-kernels, each of which keeps `vectors` x `rows` sums in registers. Per step (a
# loop may be unrolled to several) the main one must have exactly that many multiply-adds, one broadcast for each row,
# and `vectors` loads. No loop may move vectors from or to the stack. The kernels of attention, and the functions that
# they call apart, may have at most `single` moves of single lanes: of vectors that g++ takes apart, comparing lane by
# lane, there are hundreds.

BEGIN {
  fields = split(expected, field, " ")
  for (i = 1; i <= fields; i += 3) {
    vectors[field[i]] = field[i + 1]
    rows[field[i]] = field[i + 2]
  }
  numbers[1] = "float"
  numbers[2] = "double"
  kernels[1] = "scores"
  kernels[2] = "columns"
  kernels[3] = "rows"
}

function fault(text) {
  print "fault: " text
  faults++
}

function innermost(i,    j) {
  for (j = 1; j <= loops; j++)
    if (first[j] >= first[i] && last[j] <= last[i] && (first[j] > first[i] || last[j] < last[i])) return 0
  return 1
}

# Counts what the loop from `i` to `last` holds.
function tally(i, end) {
  sums = stack = broadcasts = loads = copies = 0
  for (; i <= end; i++) {
    if (code[i] ~ /^vfmadd/) sums++
    if (code[i] ~ /\(%rsp/ && code[i] ~ /%[xyz]mm/) stack++
    if (code[i] ~ /^vbroadcast/ || code[i] ~ /\{1to/) broadcasts++
    else if (code[i] ~ /^(vmovu|vmova|vfmadd)p?.*\(.*,%[yz]mm/) loads++
    if (code[i] ~ /^vmov[ua]p. *%[xyz]mm[0-9]*,%/) copies++
  }
}

function finish(    i, step) {
  if (entry != "" && singles > single) fault(entry ": " singles " moves of single lanes, at most " single " expected")
  entry = ""
  singles = main_sums = 0
  for (i = 1; set != "" && i <= loops; i++) {
    if (!innermost(i)) continue
    tally(first[i], last[i])
    if (sums > 0 && stack > 0)
      fault(name ": " stack " vector moves from or to the stack in a loop of " sums " multiply-adds")
    if (sums < main_sums || (sums == main_sums && loads <= main_loads)) continue
    main_sums = sums
    main_broadcasts = broadcasts
    main_loads = loads
    main_copies = copies
    main_length = last[i] - first[i] + 1
  }
  if (set != "") {
    step = main_sums / (vectors[set] * rows[set])
    if (main_sums == 0 || step != int(step))
      fault(name ": " main_sums " multiply-adds in the main loop instead of " vectors[set] * rows[set] " for each step")
    else if (main_broadcasts != step * rows[set])
      fault(name ": " main_broadcasts " broadcasts in the main loop instead of " step * rows[set])
    else if (main_loads != step * vectors[set])
      fault(name ": " main_loads " loads of vectors in the main loop instead of " step * vectors[set])
    else
      printf "%s: %d instructions, of which %d multiply-adds, %d broadcasts, %d loads, %d copies; steps: %d\n", name,
        main_length, main_sums, main_broadcasts, main_loads, main_copies, step
    seen[key]++
  }
  count = loops = 0
  set = ""
  split("", index_of)
}

/^[0-9a-f]+ <.*>:$/ {
  finish()
  name = $0
  sub(/^[0-9a-f]* </, "", name)
  sub(/>:$/, "", name)
  sub(/\(.*/, "", name)
  if (name ~ /::(Forward|Backward)Kernel<(float|double)>::avx(2|512)$/) {
    entry = name
    entries++
  }
  if (name ~ /::Avx(2|512)Micro<(float|double)>::apart</) entry = name
  for (s in vectors)
    for (n = 1; n <= 2; n++)
      for (k = 1; k <= 3; k++)
        if (index(name, s "<" numbers[n] ">::" kernels[k]) && name ~ ("::" kernels[k] "$")) {
          set = s
          key = s "<" numbers[n] ">::" kernels[k]
          name = key
        }
  next
}

entry != "" && /^ *[0-9a-f]+:.*vp(ins|ext)r/ { singles++ }

set != "" && /^ *[0-9a-f]+:/ {
  address = $1
  sub(/:$/, "", address)
  line = $0
  sub(/^ *[0-9a-f]*:[ \t]*/, "", line)
  code[++count] = line
  index_of[address] = count
  if (line ~ /^j/) {
    split(line, part, " ")
    if (part[2] in index_of) {
      first[++loops] = index_of[part[2]]
      last[loops] = count
    }
  }
}

END {
  finish()
  for (s in vectors)
    for (n = 1; n <= 2; n++)
      for (k = 1; k <= 3; k++)
        if (!((s "<" numbers[n] ">::" kernels[k]) in seen)) fault(s "<" numbers[n] ">::" kernels[k] " is not there")
  if (entries < 8) fault("kernels of attention: " entries + 0 " of 8")
  if (faults > 0) exit 1
}
