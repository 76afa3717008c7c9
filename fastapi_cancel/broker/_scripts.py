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

-- A life of the server. A log remembers it, as the name of the stream's one consumer group.
local function server()
  return string.match(redis.call('INFO', 'server'), 'run_id:(%x+)')
end

local function create(key, epoch)
  local id = string.format('%.0f-0', epoch)
  redis.call('XGROUP', 'CREATE', key, server(), '$', 'MKSTREAM')
  redis.call('XSETID', key, id)
  return id
end

-- The server has begun anew, or another one has taken over: what it does not have, it cannot know. Where the log is,
-- and where it was.
local function next_epoch(key, last)
  local run, known = server(), redis.call('XINFO', 'GROUPS', key)
  if known[1] and known[1][2] == run then return last end
  redis.call('XGROUP', 'CREATE', key, run, '$')
  if known[1] then redis.call('XGROUP', 'DESTROY', key, known[1][2]) end
  return string.format('%.0f-0', math.max(now(), tonumber(string.match(last, '%d+')) + 1)), last
end

local function append(key, last, wire, retain, max_age, channel, after)
  local epoch, number = string.match(last, '(%d+)-(%d+)')
  local id = string.format('%s-%.0f', epoch, number + 1)
  local link = after and {'after', after} or {}
  redis.call('XADD', key, 'MAXLEN', retain, id, 'at', string.format('%.0f', now()), 'event', wire, unpack(link))
  forget_old(key, tonumber(max_age))
  redis.call('PEXPIRE', key, max_age)
  redis.call('PUBLISH', channel, id .. ' ' .. wire)
  return id
end
"""
)

PUBLISH = (
    _LOG
    + """
-- the log; the wire format, how many to keep, milliseconds to keep one, the channel
local last, after = next_epoch(KEYS[1], last_id(KEYS[1]) or create(KEYS[1], now()))
return append(KEYS[1], last, ARGV[1], ARGV[2], ARGV[3], ARGV[4], after)
"""
)

LOOK = (
    _LOG
    + """
-- the log; milliseconds to keep it. Its newest id; it is kept for as long as somebody looks.
local id = last_id(KEYS[1]) or create(KEYS[1], now())
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return id
"""
)

READ = (
    _LOG
    + """
-- the log; the id to begin behind, how many to read, milliseconds to keep one
local id = last_id(KEYS[1]) or create(KEYS[1], now())
forget_old(KEYS[1], tonumber(ARGV[3]))
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return {id, redis.call('XRANGE', KEYS[1], '(' .. ARGV[1], '+', 'COUNT', ARGV[2])}
"""
)

# The runs of a key are a hash: "run:<token>" is {id, worker, until, reason}, "early:<id>" is {until, reason},
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
-- the runs; the run's token and id, its worker, milliseconds until it has to enter again.
-- The reason if it is to stop.
local run = get('run:' .. ARGV[1])
local reason = run and run.reason
if not run then
  for _, name in ipairs({ARGV[2], ''}) do
    local early = get('early:' .. name)
    if early then
      redis.call('HDEL', key, 'early:' .. name)
      if early['until'] > time then reason = early.reason break end
    end
  end
end
local entry = {id = ARGV[2], worker = ARGV[3], ['until'] = time + ARGV[4], reason = reason or nil}
redis.call('HSET', key, 'run:' .. ARGV[1], cjson.encode(entry))
keep(tonumber(ARGV[4]))
return reason
"""
)

LEAVE = (
    _RUNS
    + """
-- the runs; the run's token, milliseconds to remember that it has ended
redis.call('HDEL', key, 'run:' .. ARGV[1])
redis.call('HSET', key, 'ended', string.format('%.0f', time))
keep(tonumber(ARGV[2]))
"""
)

STOP = (
    _RUNS
    + """
-- the runs; the run's id or '', the reason, milliseconds to wait for a run, what its worker listens to
local fields, count, told = redis.call('HGETALL', key), 0, {}
for i = 1, #fields, 2 do
  local token = string.match(fields[i], '^run:(.*)$')
  if token then
    local entry = cjson.decode(fields[i + 1])
    if entry['until'] <= time then
      redis.call('HDEL', key, fields[i])
    elseif ARGV[1] == '' or ARGV[1] == entry.id then
      entry.reason = ARGV[2]
      redis.call('HSET', key, fields[i], cjson.encode(entry))
      count = count + 1
      told[entry.worker] = told[entry.worker] or {}
      table.insert(told[entry.worker], token)
    end
  end
end
for worker, runs in pairs(told) do
  redis.call('PUBLISH', ARGV[4] .. worker, cjson.encode({runs = runs, reason = ARGV[2]}))
end
local ended = tonumber(redis.call('HGET', key, 'ended') or 0)
if count == 0 and (ARGV[1] ~= '' or ended + ARGV[3] <= time) then
  redis.call('HSET', key, 'early:' .. ARGV[1], cjson.encode({['until'] = time + ARGV[3], reason = ARGV[2]}))
  keep(tonumber(ARGV[3]))
end
return count
"""
)

# The stream of a key is a hash: its run, the epoch of its log, its state, when its producer has to be heard of again,
# "last" is the number of its last event, "idle" since when nobody reads it, "reader:<id>" is {until, at}.

_STREAM = (
    _LOG
    + """
local stream, log, time = KEYS[1], KEYS[2], now()

local function get(field)
  return redis.call('HGET', stream, field) or nil
end

local function is_live()
  return get('state') == 'live' and tonumber(get('until')) > time
end

local function read_by(id, at, lease)
  local reader = cjson.encode({['until'] = time + lease, at = tonumber(at)})
  redis.call('HSET', stream, 'reader:' .. id, reader)
  redis.call('HDEL', stream, 'idle')
end

local function readers(idle_from)
  local fields, count, at = redis.call('HGETALL', stream), 0, 0
  for i = 1, #fields, 2 do
    if string.sub(fields[i], 1, 7) == 'reader:' then
      local reader = cjson.decode(fields[i + 1])
      if reader['until'] <= time then
        redis.call('HDEL', stream, fields[i])
      else
        count, at = count + 1, math.max(at, reader.at)
      end
    end
  end
  if count == 0 then redis.call('HSETNX', stream, 'idle', string.format('%.0f', idle_from)) end
  return count, at
end

local function tell(topic, at)
  redis.call('PUBLISH', topic .. get('worker'), cjson.encode({run = get('run'), at = at}))
end
"""
)

CLAIM = (
    _STREAM
    + """
-- the stream, its log; the run, its worker, milliseconds until it has to be heard of, whether to replace a live one,
-- milliseconds to keep it. Whoever claims it is its first reader.
local before, epoch = get('run'), tonumber(get('epoch') or 0)
local live = is_live()
if live and (ARGV[4] == '0' or before == ARGV[1]) then return {before, get('epoch'), false} end
epoch = string.format('%.0f', math.max(time, epoch + 1))
redis.call('DEL', stream, log)
create(log, tonumber(epoch))
redis.call('HSET', stream, 'run', ARGV[1], 'epoch', epoch, 'state', 'live', 'worker', ARGV[2],
  'until', string.format('%.0f', time + ARGV[3]))
read_by(ARGV[1], 0, ARGV[3])
redis.call('PEXPIRE', stream, ARGV[5])
redis.call('PEXPIRE', log, ARGV[5])
return {ARGV[1], epoch, live and before}
"""
)

PRODUCE = (
    _STREAM
    + """
-- the stream, its log; the run, the event's number, its wire format, how many to keep, milliseconds to keep one,
-- the channel. Whether it is there now, which it may have been before.
if get('run') ~= ARGV[1] or get('state') ~= 'live' then return 0 end
local last = last_id(log)
local number = last and string.match(last, '^' .. get('epoch') .. '-(%d+)')
if not number then return 0 end
number = tonumber(number)
if number == ARGV[2] - 1 then
  append(log, last, ARGV[3], ARGV[4], ARGV[5], ARGV[6])
  redis.call('PEXPIRE', stream, ARGV[5])
elseif number < ARGV[2] - 1 then
  return 0
end
return 1
"""
)

RENEW = (
    _STREAM
    + """
-- the stream, its log; the run, milliseconds until it has to be heard of, milliseconds to keep it.
-- For how long nobody has read it, if so; how far the quickest reader is.
-- Readers that were not heard of may have been kept from it, as we were: they have a little time.
if get('run') ~= ARGV[1] then return false end
redis.call('HSET', stream, 'until', string.format('%.0f', time + ARGV[2]))
redis.call('PEXPIRE', stream, ARGV[3])
local count, at = readers(time + ARGV[2] * 2 / 3)
return {count == 0 and time - tonumber(get('idle')), at}
"""
)

FINISH = (
    _STREAM
    + """
-- the stream, its log; the run, how it has ended, milliseconds to keep it, how many events to keep, milliseconds to
-- keep one, the channel, and the last events. Whether they are there now, which they may have been before.
if get('run') ~= ARGV[1] then return 0 end
if get('state') ~= 'live' then return 1 end
local last = last_id(log)
if not last then return 0 end
for i = 7, #ARGV do
  last = append(log, last, ARGV[i], ARGV[4], ARGV[5], ARGV[6])
end
redis.call('HSET', stream, 'state', ARGV[2], 'last', string.match(last, '-(%d+)'))
redis.call('PEXPIRE', stream, ARGV[3])
redis.call('PEXPIRE', log, ARGV[3])
return 1
"""
)

FIND = (
    _STREAM
    + """
-- the stream, its log
local state = get('state')
return state and {get('run'), get('epoch'), state, get('last') or '0'}
"""
)

ATTEND = (
    _STREAM
    + """
-- the stream, its log; the run, the reader, the number it has read, milliseconds until it is to be heard of again,
-- what the producer's worker listens to. What has become of the run.
local run = get('run')
if run ~= ARGV[1] then return run and 'replaced' or 'lost' end
read_by(ARGV[2], ARGV[3], ARGV[4])
if get('state') ~= 'live' then return 'there' end
tell(ARGV[5], tonumber(ARGV[3]))
return is_live() and 'there' or 'silent'
"""
)

DEPART = (
    _STREAM
    + """
-- the stream, its log; the run, the reader, what the producer's worker listens to
if get('run') ~= ARGV[1] then return end
redis.call('HDEL', stream, 'reader:' .. ARGV[2])
if readers(time) == 0 and get('state') == 'live' then tell(ARGV[3], -1) end
"""
)
