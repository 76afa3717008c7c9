"""What must happen in Redis in one piece.

A log is a stream whose ids are ``epoch-number``. Redis remembers the last id of a stream even when all its
entries have been trimmed, so the number goes on for as long as the key lives. Redis 7 could count by itself
(``XADD key 5-*``); 6.2 cannot.
"""

_NOW = """
local function now()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end
"""

_LOG = (
    _NOW
    + """

local function last_id(key)
  local info = redis.pcall('XINFO', 'STREAM', key)
  if info.err then return nil end
  for i = 1, #info, 2 do
    if info[i] == 'last-generated-id' then return info[i + 1] end
  end
end

local function forget_old(key, max_age)
  local oldest = now() - max_age
  while true do
    local entry = redis.call('XRANGE', key, '-', '+', 'COUNT', 1)[1]
    if not entry or tonumber(entry[2][2]) >= oldest then return end
    redis.call('XDEL', key, entry[1])
  end
end

local function create(key)
  local id = string.format('%.0f-0', now())
  redis.call('XGROUP', 'CREATE', key, 'none', '$', 'MKSTREAM')
  redis.call('XGROUP', 'DESTROY', key, 'none')
  redis.call('XSETID', key, id)
  return id
end
"""
)

PUBLISH = (
    _LOG
    + """
-- the log; the wire format, how many to keep, milliseconds to keep one, the channel
local epoch, number = string.match(last_id(KEYS[1]) or create(KEYS[1]), '(%d+)-(%d+)')
local id = string.format('%s-%.0f', epoch, number + 1)
redis.call('XADD', KEYS[1], 'MAXLEN', ARGV[2], id, 'at', string.format('%.0f', now()), 'event', ARGV[1])
forget_old(KEYS[1], tonumber(ARGV[3]))
redis.call('PEXPIRE', KEYS[1], ARGV[3])
redis.call('PUBLISH', ARGV[4], id .. ' ' .. ARGV[1])
return id
"""
)

LOOK = (
    _LOG
    + """
-- the log; milliseconds to keep it. Its newest id; it is kept for as long as somebody looks.
local id = last_id(KEYS[1]) or create(KEYS[1])
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return id
"""
)

READ = (
    _LOG
    + """
-- the log; the id to begin behind, how many to read, milliseconds to keep one
local id = last_id(KEYS[1]) or create(KEYS[1])
forget_old(KEYS[1], tonumber(ARGV[3]))
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return {id, redis.call('XRANGE', KEYS[1], '(' .. ARGV[1], '+', 'COUNT', ARGV[2])}
"""
)

# The runs of a key are a hash: "run:<id>" is {worker, until, reason}, "early:<id>" is {until, reason},
# "ended" is when one has ended. Times are Redis' own, in milliseconds.

_RUNS = (
    _NOW
    + """
local key, time = KEYS[1], now()

local function get(field)
  local value = redis.call('HGET', key, field)
  return value and cjson.decode(value)
end

local function keep(milliseconds)
  if redis.call('PTTL', key) < milliseconds then redis.call('PEXPIRE', key, milliseconds) end
end
"""
)

ENTER = (
    _RUNS
    + """
-- the runs; the run, its worker, milliseconds until it has to enter again. The reason if it is to stop.
local run = get('run:' .. ARGV[1])
local reason = run and run.reason
if not run then
  for _, name in ipairs({ARGV[1], ''}) do
    local early = get('early:' .. name)
    if early then
      redis.call('HDEL', key, 'early:' .. name)
      if early['until'] > time then reason = early.reason break end
    end
  end
end
local entry = {worker = ARGV[2], ['until'] = time + ARGV[3], reason = reason or nil}
redis.call('HSET', key, 'run:' .. ARGV[1], cjson.encode(entry))
keep(tonumber(ARGV[3]))
return reason
"""
)

LEAVE = (
    _RUNS
    + """
-- the runs; the run, milliseconds to remember that it has ended
redis.call('HDEL', key, 'run:' .. ARGV[1])
redis.call('HSET', key, 'ended', string.format('%.0f', time))
keep(tonumber(ARGV[2]))
"""
)

STOP = (
    _RUNS
    + """
-- the runs; the run or '', the reason, milliseconds to wait for a run, what its worker listens to, the key's name
local fields, count, told = redis.call('HGETALL', key), 0, {}
for i = 1, #fields, 2 do
  local run = string.match(fields[i], '^run:(.*)$')
  if run then
    local entry = cjson.decode(fields[i + 1])
    if entry['until'] <= time then
      redis.call('HDEL', key, fields[i])
    elseif ARGV[1] == '' or ARGV[1] == run then
      entry.reason = ARGV[2]
      redis.call('HSET', key, fields[i], cjson.encode(entry))
      count = count + 1
      told[entry.worker] = told[entry.worker] or {}
      table.insert(told[entry.worker], run)
    end
  end
end
for worker, runs in pairs(told) do
  redis.call('PUBLISH', ARGV[4] .. worker, cjson.encode({key = ARGV[5], runs = runs, reason = ARGV[2]}))
end
local ended = tonumber(redis.call('HGET', key, 'ended') or 0)
if count == 0 and (ARGV[1] ~= '' or ended + ARGV[3] <= time) then
  redis.call('HSET', key, 'early:' .. ARGV[1], cjson.encode({['until'] = time + ARGV[3], reason = ARGV[2]}))
  keep(tonumber(ARGV[3]))
end
return count
"""
)
