import { QueryClient, QueryClientProvider } from '@tanstack/react-query'
import { StrictMode } from 'react'
import { createRoot } from 'react-dom/client'
import { AutotagProvider } from 'supabase-autotag/react'
import { App } from './App'
import { supabase } from './supabase'

createRoot(document.getElementById('root')!).render(
  <StrictMode>
    <QueryClientProvider client={new QueryClient()}>
      <AutotagProvider supabase={supabase}>
        <App />
      </AutotagProvider>
    </QueryClientProvider>
  </StrictMode>,
)
