import type { QueryClient, QueryKey } from '@tanstack/react-query'
import { useEffect, useReducer } from 'react'
import type { AnyClient } from '../types.js'

export interface Shareable { start(): void, stop(): void }

const all = new WeakMap<QueryClient, Map<string, Shareable>>()
const users = new WeakMap<Shareable, number>()
const names = new WeakMap<AnyClient, number>()
let clients = 0

/** Identifies a client of supabase-js in a cache key, because two clients with different users may share a cache. */
export function nameOf(supabase: AnyClient): number {
  const name = names.get(supabase) ?? ++clients
  names.set(supabase, name)
  return name
}

/** One object for all components with the same name. It runs while at least one of them is on the page. */
export function useShared<T extends Shareable>(client: QueryClient, name: string, make: () => T): T {
  const [, lookAgain] = useReducer((count: number) => count + 1, 0)
  const own = all.get(client) ?? new Map<string, Shareable>()
  all.set(client, own)
  const shared = (own.get(name) as T | undefined) ?? make()
  own.set(name, shared)
  useEffect(() => {
    if (own.get(name) !== shared && own.has(name)) return lookAgain() // another component made a new one while this one was hidden (<Activity>)
    own.set(name, shared)
    const count = (users.get(shared) ?? 0) + 1
    users.set(shared, count)
    if (count === 1) shared.start()
    return () => {
      const left = users.get(shared)! - 1
      users.set(shared, left)
      if (left) return
      shared.stop()
      own.delete(name)
    }
  }, [own, name, shared])
  return shared
}

/** Makes a function that fetches a query again, one fetch at a time. Calls during a fetch cause one more fetch after it. */
export function fetchingAnew(client: QueryClient, queryKey: QueryKey, load: () => Promise<unknown>): () => Promise<void> {
  const fetch = (): Promise<unknown> => client.fetchQuery({ queryKey, queryFn: load, staleTime: 0, retry: 3 }).catch(() => undefined)
  let running = false
  let again = false
  return async () => {
    again = true
    if (running) return
    running = true
    try {
      if (client.getQueryState(queryKey)?.fetchStatus === 'fetching') await fetch() // TanStack Query's own; it may have read before this call
      while (again) {
        again = false
        await fetch()
      }
    } finally {
      running = false
    }
  }
}
