import type { QueryClient, QueryKey } from '@tanstack/react-query'
import { fromRest } from '../errors.js'
import type { Live } from '../live.js'

const CHUNK = 500 // rows of one request; a project's own limit is rarely lower
const MOST_IDS = 100 // of one request, and
const LONGEST_IDS = 4_000 // their characters: proxies refuse longer addresses
const RETRIES = [1_000, 2_000, 4_000, 8_000, 16_000] // ms; after that, the next message fetches
const WRITTEN = ['tagging_stage', 'tagging_progress', 'tagging_eta', 'tagging_error', 'tagging_result', 'tags']
const LIVE = /^(queued|preparing|submitted|processing|completing)$/

export type Key = string | number
export type AnyRow = Record<string, unknown>
export interface AssetData<Row> { rows: Row[], hasMore: boolean }

/** A query of supabase-js that has its table, columns and filters. */
// eslint-disable-next-line @typescript-eslint/no-explicit-any
type Builder = any

export interface Source {
  query: () => Builder
  key: string
  orderBy: string
  ascending: boolean
  pageSize: number
  written: readonly string[]
}

/** The address of a query: what it shows. */
export function addressOf(query: () => Builder): string {
  const builder = query() as { url?: URL, schema?: string }
  if (!builder.url) throw new Error('useAssets: `query` must return a query of supabase-js: supabase.from(…).select(…)')
  return `${builder.schema ?? ''} ${builder.url.pathname}${builder.url.search}`
}

/** A select list with columns under names of one letter, and the names that they stand for. */
export interface Lean { select: string, names: Record<string, string> }

/**
 * Of a select list, the key and what comes from the columns that autotag writes. Letters instead of names make the answer half as long.
 * null: they cannot be told apart.
 */
export function leanSelect(select: string | null, key: string, written: readonly string[]): Lean | null {
  const items = !select || select === '*' ? [key, ...written] : itemsOf(select)
  if (select?.includes('"') || items.length > 1 && items.includes('*')) return null
  const lean: Lean = { select: '', names: {} }
  for (const item of items) {
    const [, alias, source = ''] = /^(?:([^:()]+):(?!:))?(.*)$/.exec(item)!
    const [column = ''] = source.split(/->|::|[(!.]/, 1)
    const path = source.split('::', 1)[0]!.split(/->>?/)
    const name = alias ?? (source.includes('(') ? column : path.at(-1)!)
    if (name !== key && !written.includes(column)) continue
    if (path.length > 1 && /^-?\d+$/.test(name)) return null // an element of a list has no name of its own
    const letter = String.fromCharCode(97 + Object.keys(lean.names).length)
    lean.names[letter] = name
    lean.select += `${lean.select && ','}${letter}:${source}`
  }
  const names = Object.values(lean.names)
  return names.includes(key) && names.length <= 26 ? lean : null
}

/** The items of a select list. */
function itemsOf(select: string): string[] {
  const items = ['']
  let depth = 0
  for (const part of select.split(/([(),])/)) {
    if (part === ',' && !depth) { items.push(''); continue }
    depth += part === '(' ? 1 : part === ')' ? -1 : 0
    items.push(items.pop()! + part)
  }
  return items.map((item) => item.trim())
}

/** Compares two values as Postgres orders them: numbers, numbers as text, times and uuids. */
function compare(a: unknown, b: unknown): number {
  if (a === b) return 0
  if (typeof a === 'number' && typeof b === 'number') return a - b
  const [x, y] = [String(a), String(b)]
  if (/^-?\d+$/.test(x) && /^-?\d+$/.test(y)) return BigInt(x) < BigInt(y) ? -1 : 1
  return x < y ? -1 : 1
}

const quote = (value: unknown): string => `"${String(value).replace(/["\\]/g, '\\$&')}"`

function renamed<Row extends AnyRow>(row: Row, names: Record<string, string>): Row {
  return Object.fromEntries(Object.entries(row).map(([letter, value]) => [names[letter], value])) as Row
}

/**
 * The rows of one query in a QueryClient, and the one place that fetches them: pages, and what messages tell has changed. One
 * request at a time; what is told meanwhile goes into the next one.
 */
export class AssetList<Row extends AnyRow> {
  source: Source
  readonly #client: QueryClient
  readonly #queryKey: QueryKey
  readonly #live: Live<Key>
  #ids = new Set<Key>() // whose rows have changed
  #head = false // rows have changed, and nobody says which
  #everything = false
  #put = new Map<unknown, Row>() // by this page, since the last load began
  #elsewhere = new Set<unknown>() // rows below those that are loaded
  #jobs = new Set<string>()
  #busy: Promise<unknown> = Promise.resolve()
  #pumping = false
  #running = 0
  #loadBegan = 0
  #fetchEnded = 0
  #generation = 0 // of users
  #failures = 0
  #timer: ReturnType<typeof setTimeout> | undefined
  #lean = true
  #more: Promise<void> | null = null
  #stopListening: (() => void) | null = null

  constructor(client: QueryClient, queryKey: QueryKey, live: Live<Key>, source: Source) {
    this.#client = client
    this.#queryKey = queryKey
    this.#live = live
    this.source = source
  }

  start(): void {
    const [client, queryKey] = [this.#client, this.#queryKey]
    this.#stopListening = this.#live.listen({
      onChange: (ids, jobId) => this.changed(ids, jobId),
      onSync: () => {
        if (!this.#data) void client.refetchQueries({ queryKey, exact: true }, { cancelRefetch: false }) // its first load has failed
        if (this.#loadBegan >= this.#live.liveSince) return
        this.#everything = true
        void this.#pump()
      },
      onEnqueued: (ids, since) => this.#enqueued(ids, since),
      onUserChange: () => this.#forget(),
    })
  }

  stop(): void {
    this.#stopListening?.()
    clearTimeout(this.#timer)
  }

  get #data(): AssetData<Row> | undefined { return this.#client.getQueryData<AssetData<Row>>(this.#queryKey) }

  #write(rows: Row[], hasMore: boolean): void {
    this.#client.setQueryData<AssetData<Row>>(this.#queryKey, { rows, hasMore })
  }

  #keyOf(row: Row): unknown { return row[this.source.key] }

  #before(a: Row, b: Row): boolean {
    const { orderBy, key, ascending } = this.source
    const [x, y] = [a[orderBy], b[orderBy]]
    if ((x === null) !== (y === null)) return y === null // nulls last
    const order = compare(x, y) || compare(a[key], b[key])
    return ascending ? order < 0 : order > 0
  }

  // -- what is asked for

  /** All that is loaded, anew; the first page if nothing is. TanStack Query calls it. */
  load(): Promise<AssetData<Row>> {
    return this.#alone(async () => {
      const count = Math.max(this.#data?.rows.length ?? 0, this.source.pageSize)
      this.#everything = this.#head = false
      this.#ids.clear()
      return await this.#top(count)
    }).finally(() => { setTimeout(() => { void this.#pump() }) }) // when TanStack Query has stored it
  }

  /** The next page. */
  loadMore(): Promise<void> {
    this.#more ??= this.#alone(async () => {
      const data = this.#data
      if (!data?.hasMore) return
      const generation = this.#generation
      const rows = await this.#page(this.source.pageSize, data.rows.at(-1))
      const now = this.#data
      if (!now || generation !== this.#generation) return
      const known = new Set(now.rows.map((row) => this.#keyOf(row)))
      this.#elsewhere.clear()
      this.#write([...now.rows, ...rows.filter((row) => !known.has(this.#keyOf(row)))], rows.length === this.source.pageSize)
    }).finally(() => { this.#more = null; void this.#pump() })
    return this.#more
  }

  /** Shows rows that this page has written: new ones in their place, known ones with their new values. */
  put(rows: readonly Row[]): void {
    for (const row of rows) this.#put.set(this.#keyOf(row), row)
    const data = this.#data
    if (data) this.#write(this.#merge(data, rows, new Set()), data.hasMore)
  }

  changed(ids: readonly Key[] | null, jobId: string | null): void {
    if (ids) for (const id of ids) this.#ids.add(id)
    else if (jobId && !this.#jobs.has(jobId)) this.#everything = true // rows that look done may be tagged again
    else this.#head = true
    if (!ids && jobId) this.#jobs.add(jobId)
    void this.#pump()
  }

  #enqueued(ids: readonly Key[], since: number): void {
    const data = this.#data
    if (!data || this.#running || this.#fetchEnded >= since) return this.changed(ids, null)
    const queued = new Set<unknown>(ids)
    this.#write(data.rows.map((row) => queued.has(this.#keyOf(row))
      ? { ...row, tagging_stage: 'queued', tagging_progress: 0, tagging_eta: null, tagging_error: null } : row), data.hasMore)
  }

  #forget(): void {
    this.#generation++
    this.#ids.clear()
    this.#put.clear()
    this.#jobs.clear()
    this.#head = this.#everything = false
    this.#loadBegan = 0
    if (this.#data) this.#write([], false)
  }

  // -- one request at a time

  /** Runs after what runs. */
  async #alone<T>(run: () => Promise<T>): Promise<T> {
    this.#running++
    const done = this.#busy.then(run).finally(() => { this.#running-- })
    this.#busy = done.catch(() => undefined)
    return await done
  }

  async #pump(): Promise<void> {
    if (this.#pumping) return
    this.#pumping = true
    clearTimeout(this.#timer)
    try {
      while (this.#data && (this.#ids.size || this.#head || this.#everything)) {
        await this.#alone(() => this.#fetchChanges())
        this.#failures = 0
      }
    } catch (error) {
      const delay = RETRIES[this.#failures++]
      if (delay) this.#timer = setTimeout(() => { void this.#pump() }, delay)
      else { this.#failures = 0; console.warn('supabase-autotag:', error) }
    } finally {
      this.#pumping = false
    }
  }

  async #fetchChanges(): Promise<void> {
    const data = this.#data
    if (!data) return
    const generation = this.#generation
    const [everything, head] = [this.#everything, this.#head]
    if (everything || head) {
      const last = everything ? data.rows.length : data.rows.findLastIndex((row) => this.#unsettled(row)) + 1
      const ids = this.#ids
      this.#ids = new Set()
      this.#everything = this.#head = false
      try {
        const fresh = await this.#top(Math.max(last, this.source.pageSize))
        if (generation === this.#generation) this.#write(fresh.rows, fresh.hasMore)
      } catch (error) {
        if (generation === this.#generation) { this.#everything ||= everything; this.#head ||= head; for (const id of ids) this.#ids.add(id) }
        throw error
      }
      return
    }
    const known = new Set(data.rows.map((row) => this.#keyOf(row)))
    const chunk: Key[] = []
    let length = 0
    for (const id of this.#ids) {
      length += String(id).length + 1
      if (chunk.length >= MOST_IDS || length > LONGEST_IDS) break
      this.#ids.delete(id)
      if (!this.#elsewhere.has(id)) chunk.push(id)
    }
    if (!chunk.length) return
    try {
      const rows = await this.#byId(chunk, chunk.every((id) => known.has(id)))
      const now = this.#data
      if (!now || generation !== this.#generation) return
      const merged = this.#merge(now, rows, new Set<unknown>(chunk))
      this.#head ||= now.hasMore && merged.length < this.source.pageSize // deleted or filtered out: fill the page again
      this.#write(merged, now.hasMore)
    } catch (error) {
      if (generation === this.#generation) for (const id of chunk) this.#ids.add(id)
      throw error
    }
  }

  #unsettled(row: Row): boolean {
    const stage = row['tagging_stage']
    return stage === undefined || LIVE.test(String(stage))
  }

  /** The rows with those that were fetched. What was asked for and did not come is gone: deleted, or filtered out. */
  #merge(data: AssetData<Row>, fetched: readonly Row[], asked: ReadonlySet<unknown>): Row[] {
    const fresh = new Map(fetched.map((row) => [this.#keyOf(row), row]))
    const rows = data.rows.filter((row) => !asked.has(this.#keyOf(row)) || fresh.has(this.#keyOf(row))).map((row) => {
      const newer = fresh.get(this.#keyOf(row))
      fresh.delete(this.#keyOf(row))
      return newer ? { ...row, ...newer } : row
    })
    for (const row of fresh.values()) {
      const at = rows.findIndex((other) => this.#before(row, other))
      if (at >= 0) rows.splice(at, 0, row)
      else if (data.hasMore) this.#elsewhere.add(this.#keyOf(row)) // on a later page
      else rows.push(row)
    }
    return rows
  }

  // -- requests

  async #ask(builder: Builder): Promise<Row[]> {
    const { data, error, status } = await (builder as PromiseLike<{ data: Row[] | null, error: never, status: number }>)
    this.#fetchEnded = Date.now()
    if (error) throw fromRest(error, status)
    return data ?? []
  }

  /** The first rows, as many as `count`, and those that this page has written meanwhile. */
  async #top(count: number): Promise<AssetData<Row>> {
    const began = Date.now()
    this.#put.clear()
    const generation = this.#generation
    const rows: Row[] = []
    let full = true
    while (full && rows.length < count) {
      const size = Math.min(count - rows.length, CHUNK)
      const page = await this.#page(size, rows.at(-1))
      rows.push(...page)
      full = page.length === size
    }
    if (generation === this.#generation) this.#loadBegan = began
    const tail = full ? this.#data?.rows ?? [] : []
    const top = new Set(rows.map((row) => this.#keyOf(row)))
    const joins = tail.some((row) => top.has(this.#keyOf(row))) // otherwise rows are missing in between
    const last = rows.at(-1)
    const below = joins && last ? tail.filter((row) => !top.has(this.#keyOf(row)) && this.#before(last, row)) : []
    const hasMore = full && (below.length ? this.#data!.hasMore : true)
    const loaded = { rows: [...rows, ...below], hasMore }
    this.#elsewhere.clear()
    return { rows: this.#merge(loaded, [...this.#put.values()].filter((row) => !top.has(this.#keyOf(row))), new Set()), hasMore }
  }

  async #page(size: number, after: Row | undefined): Promise<Row[]> {
    const { query, key, orderBy, ascending } = this.source
    const then = ascending ? 'gt' : 'lt'
    let builder = query()
    if (after) {
      const [value, id] = [after[orderBy], after[key]]
      if (value === undefined || id === undefined) throw new Error(`useAssets: select the columns ${orderBy} and ${key}, too`)
      if (orderBy === key) builder = builder[then](key, id)
      else if (value === null) builder = builder.is(orderBy, null)[then](key, id)
      else builder = builder.or(`${orderBy}.${then}.${quote(value)},and(${orderBy}.eq.${quote(value)},${key}.${then}.${quote(id)}),${orderBy}.is.null`)
    }
    if (orderBy !== key) builder = builder.order(orderBy, { ascending, nullsFirst: false })
    return await this.#ask(builder.order(key, { ascending }).limit(size))
  }

  /** Rows by their ids; of rows that are known, only the columns that autotag writes. */
  async #byId(ids: readonly Key[], known: boolean): Promise<Row[]> {
    const { query, key, written } = this.source
    const builder = query()
    const full = builder.url.searchParams.get('select') as string | null
    const lean = known && this.#lean ? leanSelect(full, key, written) : null
    try {
      const rows = await this.#ask((lean ? builder.select(lean.select) : builder).in(key, ids))
      return lean ? rows.map((row) => renamed(row, lean.names)) : rows
    } catch (error) {
      if (!lean || (error as { code?: string }).code !== '42703') throw error
      this.#lean = false // the table has no column `tags`
      return await this.#byId(ids, false)
    }
  }
}

export { WRITTEN }
